"""`python -m hcnet_cli`, which is also what torchrun starts."""

from hcnet_cli.cli import main

if __name__ == "__main__":
    main()
