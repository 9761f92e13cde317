"""Parts of a decoder: attention, linear layers, dropout, precision and quantised weights."""
