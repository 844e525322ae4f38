"""Collecting ratings: answers -> a Label Studio project -> people -> rows, with how far the raters agree.

Imports inference and evaluation; nothing but the command imports it.
"""
