"""A config as text: on which line each setting stands; and those that come with sdtrain."""
