"""`python -m hci`: the command `hci`, for processes that start others of their own kind."""

from hci.cli import main

if __name__ == "__main__":
    main()
