"""How a run ends, in every way: signals, errors, too little memory, numbers that are not finite, a second start."""
