"""What a service has to remember between starts, in SQLite or any database that SQLAlchemy speaks.

Tables are SQLModel classes; :func:`open_database` makes those that are missing, of all modules that are imported here.
"""

from multimodal.store.database import StoreError, open_database
from multimodal.store.feedback import Feedback, Rating, Vote
from multimodal.store.keys import ApiKey, KeyStore
from multimodal.store.sessions import PictureGone, SessionStore

__all__ = [
    "ApiKey",
    "Feedback",
    "KeyStore",
    "PictureGone",
    "Rating",
    "SessionStore",
    "StoreError",
    "Vote",
    "open_database",
]
