"""The commands of the catalogue as typed methods. Written by :mod:`vfiod.client.generate`; a test holds it to that."""
