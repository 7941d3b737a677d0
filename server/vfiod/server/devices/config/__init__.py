"""What a guest sees of a PCI device: its configuration space, its MSI-X table. No input or output in here."""
