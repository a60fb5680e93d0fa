"""Teachers as a run sees them: who scores given text, and who writes some, wherever they live.

    scorer.py    what every teacher that scores can be asked     writer.py     what one that writes can be asked
    server.py    potstill's own teacher server                   black_box.py  one that is paid, asked once
    vllm.py      a stock vLLM server                             cache.py      what was paid for
    echoing.py   any endpoint that echoes log-probs              opening.py    from a config to one of these
    foreign.py   what the two of them share: prompt_logprobs.py and echo.py read their answers

Scorers around scorers: several.py by domain or together, replicas.py one after another, retokenised.py of other tokens,
cached.py once only. None of them knows torch: scores arrive as numpy arrays, and text as text.
"""
