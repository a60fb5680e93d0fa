"""What a teacher really offers, found by asking it: before a run pays for anything, and for people who choose one.

    asking.py      from a URL or a run config to findings            page.py         how they are printed
    probe.py       a teacher that scores                             chat.py         one that writes
    interview.py   the questions, and the numbers in the answers     findings.py     the limits, in one table
    comparison.py  a student beside it: tokenizers and templates     recognition.py  what answers at a URL

A probe sends a few small requests. It changes nothing and trusts no claim that it can try.
"""
