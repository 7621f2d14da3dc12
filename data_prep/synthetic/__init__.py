"""Synthetic cells: ``plan`` says what lies where, ``cell`` renders it, ``writer`` makes Major-TOM's files of it.

A cell is its place and dates (``geography``), its ground (``landscape``) and what the sensors see of that
(``reflectance``, ``radar``). ``python -m data_prep.synthetic`` is the ``command``.
"""
