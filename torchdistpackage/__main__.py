"""`python -m torchdistpackage` is the command line, also where scripts of packages are not on the path."""

from torchdistpackage.cli import main

if __name__ == "__main__":
    main()
