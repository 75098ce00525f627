"""``python -m marl_memory`` is ``marl-memory``."""

from marl_memory.cli import main

if __name__ == "__main__":
    main()
