"""A process that reads rows for a rank: ``python -m glm.data.worker FD``, started by ``glm.data.read_ahead``.

On the connection FD comes (recipe, run folder) once, then (first row, count) again and again; for each it sends the rows, or the
user's error that kept it from reading them.
"""

import signal
import sys
from multiprocessing.connection import Connection

from glm.data.batches import Batches
from glm.errors import UserError
from glm.platform.lifetime import die_with_parent


def serve(connection: Connection) -> None:
    """Until the rank closes its end."""
    recipe, folder = connection.recv()
    batches: Batches | None = None
    while True:
        first, count = connection.recv()
        try:
            batches = batches or Batches(recipe, folder)
            connection.send(batches.rows(first, count))
        except UserError as error:
            connection.send(error)


def main() -> None:
    die_with_parent()
    for told_to_the_rank in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # it may want the rows of a last step
        signal.signal(told_to_the_rank, signal.SIG_IGN)
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):  # the rank is done
        pass


if __name__ == "__main__":
    main()
