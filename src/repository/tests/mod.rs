mod crashes;
mod damage;
mod evidence;
mod explore;
mod interleavings;
mod model;
mod points;
mod power;
