"""What of other libraries' insides a run rests on, each file of one library.

A release that moves a piece is met in one place. What a library documents is imported where it is
used. tests/test_libraries.py asks for every piece by itself and says which release lacks it.
"""
