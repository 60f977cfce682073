"""The CPU side of the engine: an out-of-tree platform, torch pools, the indexer and the attention backend."""
