mod crashes;
mod damage;
mod evidence;
mod interleavings;
mod model;
mod points;
