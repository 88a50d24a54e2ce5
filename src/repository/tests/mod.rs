mod crashes;
mod damage;
mod evidence;
mod interleavings;
mod points;
mod random;
