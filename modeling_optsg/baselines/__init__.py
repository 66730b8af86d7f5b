"""The other methods of the paper and the nearest-neighbour vote, on the modules of OP-TSG."""
