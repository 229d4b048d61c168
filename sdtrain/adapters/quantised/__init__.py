"""A frozen base in eight or four bits: how weights are packed, and the linear layers that unpack them for a product.

Only what is frozen may be packed. Adapters stay float32, and what is written comes from the weights as the files hold
them, which are read again where they are needed.
"""
