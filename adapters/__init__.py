"""Parts of adapters: their layers, products of low rank, and the modules that they go to."""
