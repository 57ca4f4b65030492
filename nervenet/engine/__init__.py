"""How it gets fast, and where it runs: nobody needs this folder to understand the rest."""
