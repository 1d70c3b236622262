"""Openly licensed audio to pretrain on, for who has none.

archive       Debian's packages: fetched, checked, unpacked, nothing installed
recordings    what is inside them, as samples
debian        the command: 56 hours of music, speech and sounds as shards (its list is debian.csv.gz)
"""
