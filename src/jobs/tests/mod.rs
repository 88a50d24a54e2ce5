mod agent;
mod audit;
mod chunk_size;
mod damage;
mod lives;
mod opening;
mod prune;
mod restoring;
