"""What adapters compute, and what they keep for backward: the input that is kept anyway, in the type it came in.

peft names, creates and loads adapters; `layers.py` puts what is here in the place of its forward. The parameters stay
float32. Products are computed in the type of the activations, as those of the frozen layer are, and what is cheap is
computed again in backward. peft's own forward is the plain twin, and does what is not done here.
"""
