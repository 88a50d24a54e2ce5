mod audit;
mod chunk_size;
mod prune;
