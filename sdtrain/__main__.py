"""`python -m sdtrain`: the command line."""

from sdtrain.cli import command

if __name__ == "__main__":
    command()
