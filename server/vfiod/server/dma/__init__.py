"""Guest memory and its mappings: what devices can reach by DMA."""
