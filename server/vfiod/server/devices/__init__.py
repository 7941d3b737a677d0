"""Device models: what a device does with the regions and interrupts a backend gives it."""
