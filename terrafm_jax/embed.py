"""Embeds whole scenes: ``python -m terrafm_jax.embed --checkpoint PATH --sensor NAME=FILE ... --out OUT``.

OUT.tif is a Cloud Optimized GeoTIFF with one band per feature, OUT.zarr a Zarr group, OUT.parquet one row per
window (GeoParquet, columns of Major-TOM's embedding sets); with ``--points FILE`` OUT.parquet has one row per
place. An interrupted job goes on when the same command is given again. Also::

    python -m terrafm_jax.embed change A.tif B.tif --out CHANGE.tif
    python -m terrafm_jax.embed search --query A.tif --point LON,LAT --out HITS.csv OUT1.tif OUT2.zarr OUT3.parquet ...
    python -m terrafm_jax.embed picture A.tif|CHANGE.tif --out PCA.png [--similar-to LON,LAT]

where every .tif but CHANGE.tif may be a .zarr.

See docs/embedding.md. Exit codes: 0 done, 1 stopped or bad input (one line says what to do), 2 wrong flags.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.flags import parse, quiet_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input ends in one line on stderr and exit code 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("terrafm_jax").setLevel(logging.INFO)
    quiet_libraries()
    command, args = parse(argv, __doc__)

    from terrafm_jax.scenes import commands as do
    from terrafm_jax.scenes.run import Stopped

    try:
        {"scene": do.scene, "change": do.change, "search": do.search, "picture": do.picture}[command](args)
    except (SceneError, Stopped) as error:
        print(f"terrafm_jax.embed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one: the first waits for a snapshot
        from terrafm_jax.startup import interrupted

        interrupted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
