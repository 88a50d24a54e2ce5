mod audit;
mod prune;
