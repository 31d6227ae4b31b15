"""The database's versions. `env.py` is Alembic's door; `versions` has one file a version."""
