"""``python -m nbhd``: the command line."""

from nbhd.cli import main

if __name__ == "__main__":
    main()
