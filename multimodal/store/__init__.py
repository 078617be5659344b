"""What a service has to remember between starts, in SQLite or any database that SQLAlchemy speaks.

Tables are SQLModel classes; :func:`open_database` makes those that are missing.
"""

from multimodal.store.database import StoreError, open_database

__all__ = ["StoreError", "open_database"]
