"""One thin function per command, by family. No logic of its own."""
