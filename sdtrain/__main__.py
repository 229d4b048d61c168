"""`python -m sdtrain`: the command line."""

from sdtrain.cli import main

if __name__ == "__main__":
    main()
