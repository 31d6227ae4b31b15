"""`versions` has a file for each of the database's versions; `env.py` is Alembic's entry point."""
