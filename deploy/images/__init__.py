"""Builds the container images without a daemon: ``python -m deploy.images`` (``make image``).

An image is layers, a layer is a :class:`deploy.images.tree.Tree`, and each comes from inputs that are pinned by hash: Debian
packages (``packages.ARCH.lock``), Python packages (``requirements.lock``), this checkout. So a build is the same byte for byte
wherever it runs, and a layer whose inputs did not change is taken from the cache. Nothing here is part of the wheel.
"""
