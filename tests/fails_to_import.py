"""A module of someone that has a mistake."""

raise ZeroDivisionError("one of many")
