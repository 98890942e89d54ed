"""`python -m lpdeploy`, and what `accelerate launch -m lpdeploy` starts."""

from lpdeploy.cli.main import main

if __name__ == "__main__":
    main()
