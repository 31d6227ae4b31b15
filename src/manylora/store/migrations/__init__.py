"""The database's versions. `env.py` is Alembic's entry point; `versions` has one file a version."""
