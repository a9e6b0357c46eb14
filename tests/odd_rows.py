"""Odd data in files that open: what stands in JSON, in conversations and in tables."""

from __future__ import annotations

import json

from odd_data import HEADER, LINE, LONG, ROW, Case


def messages(*turns: object) -> str:
    return json.dumps({"messages": [{"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else turn for turn in turns]}) + "\n"


JSON = [
    Case(what="empty", name="a.json", content=b"", refused="a.json is empty (0 bytes)"),
    Case(what="empty lines", name="a.jsonl", content=b"", refused="a.jsonl is empty (0 bytes)"),
    Case(what="only blanks", name="a.json", content=" \n\t\r\n", refused="a.json has no rows"),
    Case(what="only blank lines", name="a.jsonl", content="\n\n  \n", refused="a.jsonl has no rows"),
    Case(what="an empty list", name="a.json", content="[]", refused="a.json has no rows"),
    Case(what="an empty object", name="a.json", content="{}", refused="no known format; columns: none"),
    Case(what="one object", name="a.json", content=LINE, kept=1),
    Case(what="one object with a list", name="a.json", content=json.dumps({"rows": [ROW, ROW]}), kept=2),
    Case(what="one object with two lists", name="a.json", content=json.dumps({"train": [ROW], "test": [ROW]}), refused="(train, test)"),
    Case(what="a string", name="a.json", content='"yes"', refused='a.json holds "yes": it must be a list'),
    Case(what="a number", name="a.json", content="42", refused="a.json holds 42"),
    Case(what="null", name="a.json", content="null", refused="a.json holds null"),
    Case(
        what="lists in a list", name="a.json", content=json.dumps([["a", "b"], ["c", "d"]]), refused='item 1 is ["a", "b"], not an object'
    ),
    Case(what="lists in lines", name="a.jsonl", content=LINE + '["a", "b"]\n', kept=1, dropped={2: 'line 2 is ["a", "b"], not an object'}),
    Case(what="a null among rows", name="a.json", content=json.dumps([ROW, None]), kept=1, dropped={2: "item 2 is null"}),
    Case(what="cut in a string", name="a.json", content=f"[{LINE}, {LINE}"[:60], refused="a.json is not valid JSON: Unterminated string"),
    Case(what="cut after a key", name="a.json", content='[{"prompt"', refused="Expecting ':' delimiter at line 1, column 11"),
    Case(what="cut after a row", name="a.json", content=f"[{LINE}", refused="Expecting ',' delimiter at line 2"),
    Case(what="cut in the last line", name="a.jsonl", content=LINE * 2 + LINE[:20], kept=2, dropped={3: "line 3 is not valid JSON"}),
    Case(what="cut in a number", name="a.jsonl", content=LINE + '{"prompt": -', kept=1, dropped={2: "Expecting value"}),
    Case(what="more after its end", name="a.json", content=f"[{LINE}]\n[]", refused="Extra data at line 3, column 1"),
    Case(what="comma after the last", name="a.json", content=f"[{LINE},]", refused="a.json is not valid JSON"),
    Case(what="single quotes", name="a.json", content="[{'prompt': 'a'}]", refused="property name enclosed in double quotes"),
    Case(what="two rows in a line", name="a.jsonl", content=LINE + LINE.strip() * 2, kept=1, dropped={2: "Extra data at column"}),
    Case(what="one row over many lines", name="a.jsonl", content=json.dumps(ROW, indent=2), kept=1),
    Case(what="a key twice", name="a.jsonl", content=LINE + '{"prompt": "a", "prompt": "b"}', kept=1, dropped={2: '"prompt" stands twice'}),
    Case(
        what="NaN and Infinity beside", name="a.jsonl", content='{"prompt": "a", "completion": "b", "x": [NaN, -Infinity, 1e999]}', kept=1
    ),
    Case(
        what="NaN as the answer", name="a.jsonl", content=LINE + '{"prompt": "a", "completion": NaN}', kept=1, dropped={2: "nan, not text"}
    ),
    Case(
        what="huge number beside", name="a.jsonl", content=LINE + '{"n": ' + "9" * 5000 + "}", kept=1, dropped={2: "more than 4,300 digits"}
    ),
    Case(
        what="large number as the answer", name="a.jsonl", content='{"prompt": "a", "completion": 1' + "0" * 4000 + "}", refused="not text"
    ),
    Case(what="deep nesting", name="a.json", content="[" * 100_000, refused="a.json is not valid JSON: it is nested too deeply"),
    Case(
        what="nesting that a parser bears", name="a.jsonl", content='{"prompt": ' + "[" * 900 + "]" * 900 + "}", refused="100 levels deep"
    ),
    Case(
        what="deep objects in a row", name="a.jsonl", content=LINE + '{"a":' * 500 + "1" + "}" * 500, kept=1, dropped={2: "100 levels deep"}
    ),
    Case(
        what="a line over 16 MiB",
        name="a.jsonl",
        content=f'{LINE}{{"prompt": "{LONG}"}}\n{LINE}',
        kept=2,
        dropped={2: "longer than 16 MiB"},
    ),
    Case(what="10,000 keys", name="a.json", content=json.dumps([{f"key {n}": n for n in range(10_000)}]), refused="no known format"),
    Case(what="keys like a prototype's", name="a.jsonl", content=json.dumps({**ROW, "__proto__": {"a": 1}, "constructor": "b"}), kept=1),
    Case(
        what="only a prototype", name="a.jsonl", content='{"__proto__": {"prompt": "a"}, "__class__": "b"}', refused="__proto__, __class__"
    ),
    Case(what="markup in values", name="a.jsonl", content=json.dumps({"prompt": "<script>alert(1)</script>", "completion": "<b>"}), kept=1),
    Case(what="an error page in place of data", name="a.json", content="<!DOCTYPE html><html></html>", refused="a.json is not valid JSON"),
    Case(
        what="a pointer of git lfs", name="a.jsonl", content="version https://git-lfs\noid sha256:0\n", refused="line 1 is not valid JSON"
    ),
]

TURNS = [
    Case(
        what="two user turns",
        name="a.jsonl",
        content=messages(("user", "a"), ("user", "b"), ("assistant", "c")),
        refused="second user turn",
    ),
    Case(
        what="assistant first", name="a.jsonl", content=messages(("assistant", "a"), ("user", "b")), refused="starts with an assistant turn"
    ),
    Case(what="no answer", name="a.jsonl", content=LINE + messages(("user", "a")), kept=1, dropped={2: "has no answer"}),
    Case(
        what="system in the middle",
        name="a.jsonl",
        content=messages(("user", "a"), ("assistant", "b"), ("system", "c")),
        refused="turn 3 (system)",
    ),
    Case(
        what="empty turn",
        name="a.jsonl",
        content=LINE + messages(("user", "a"), ("assistant", "")),
        kept=1,
        dropped={2: "turn 2 (assistant)"},
    ),
    Case(
        what="blank turn",
        name="a.jsonl",
        content=LINE + messages(("user", " \n"), ("assistant", "b")),
        kept=1,
        dropped={2: "turn 1 (user)"},
    ),
    Case(
        what="content is a number",
        name="a.jsonl",
        content=LINE + messages(("user", 5), ("assistant", "b")),
        kept=1,
        dropped={2: "5, not text"},
    ),
    Case(
        what="content is an object", name="a.jsonl", content=messages(("user", {"a": 1}), ("assistant", "b")), refused="{'a': 1}, not text"
    ),
    Case(
        what="content is null", name="a.jsonl", content=messages(("user", "a"), ("assistant", None)), refused="turn 2 (assistant) is empty"
    ),
    Case(what="no role", name="a.jsonl", content=messages({"content": "a"}), refused="turn 1 has no role"),
    Case(what="unknown role", name="a.jsonl", content=messages(("narrator", "a")), refused="turn 1 has the unknown role 'narrator'"),
    Case(what="role is a number", name="a.jsonl", content=messages((7, "a")), refused="turn 1 has the unknown role 7"),
    Case(what="turn is a text", name="a.jsonl", content=messages("hello"), refused="turn 1 is 'hello', not a role"),
    Case(what="turns are lists", name="a.jsonl", content=messages(["user", "a"]), refused="turn 1 is ['user', 'a'], not a role"),
    Case(what="no turns", name="a.jsonl", content=messages(), refused="has no turns"),
    Case(what="messages is a text", name="a.jsonl", content='{"messages": "hello"}', refused="'messages' is 'hello', not a list"),
    Case(what="messages is an object", name="a.jsonl", content='{"messages": {"role": "user"}}', refused="not a list of turns"),
    Case(what="answer is empty", name="a.jsonl", content=LINE + '{"prompt": "a", "completion": ""}', kept=1, dropped={2: "has no answer"}),
    Case(
        what="question is empty",
        name="a.jsonl",
        content=LINE + '{"prompt": " ", "completion": "a"}',
        kept=1,
        dropped={2: "has no question"},
    ),
    Case(
        what="answer is a list",
        name="a.jsonl",
        content=LINE + '{"prompt": "a", "completion": ["b"]}',
        kept=1,
        dropped={2: "['b'], not text"},
    ),
]

TABLES = [
    Case(
        what="ragged", name="a.csv", content=f"{HEADER}a,b\nc\nd,e,f\n", kept=1, dropped={2: "line 3 has 1 cell", 3: "line 4 has 3 cells"}
    ),
    Case(what="semicolons", name="a.csv", content="prompt;completion\na, b;c\n", kept=1),
    Case(what="tabs under .csv", name="a.csv", content="prompt\tcompletion\na, b; c\td\n", kept=1),
    Case(what="pipes", name="a.csv", content="prompt|completion\na, b|c\n", kept=1),
    Case(what="commas under .tsv", name="a.tsv", content=f"{HEADER}a,b\n", refused="no known format; columns: prompt,completion"),
    Case(what="quote not closed", name="a.csv", content=f'{HEADER}a,"b\nc,d\n', refused="in the row that begins at line 2"),
    Case(what="text after a quote", name="a.csv", content=f'{HEADER}a,"b" c\n', refused="a.csv is not valid CSV"),
    Case(what="columns of one name", name="a.csv", content="prompt,prompt\na,b\n", refused="two columns called 'prompt'"),
    Case(what="columns without a name", name="a.csv", content="prompt,completion,,\na,b,,\n", refused="two columns without a name"),
    Case(what="index without a name", name="a.csv", content=",prompt,completion\n0,a,b\n", kept=1),
    Case(what="header only", name="a.csv", content=HEADER, refused="a.csv has no rows"),
    Case(what="a line feed in a column's name", name="a.csv", content='"a\nb",c\n1,2\n', refused="no known format; columns: a"),
    Case(
        what="names that are texts",
        name="a.csv",
        content=",".join(letter * 60 for letter in "abcdefghijklmnop") + "\n" + "," * 15,
        refused="no known format; columns: aaa",
    ),
    Case(what="no header", name="a.csv", content="Who?,Me.\nWhat?,That.\n", refused="no known format; columns: Who?, Me."),
    Case(what="only blanks in a table", name="a.csv", content=" \n\n", refused="a.csv has no rows"),
    Case(
        what="10,000 columns",
        name="a.csv",
        content="\n".join([",".join(f"c{n}" for n in range(10_000)), "," * 9_999]),
        refused="columns: c0, c1",
    ),
    Case(what="old line ends", name="a.csv", content=f"{HEADER}a,b\nc,d\n".replace("\n", "\r"), kept=2),
    Case(what="mixed line ends", name="a.csv", content="prompt,completion\r\na,b\nc,d\re,f", kept=3),
    Case(what="line feeds in cells", name="a.csv", content=f'{HEADER}"a\nb\r\nc","d\n\ne"\n', kept=1),
    Case(what="a table row over 16 MiB", name="a.csv", content=f"{HEADER}a,{LONG}\n", refused="begins at line 2 is longer than 16 MiB"),
    Case(what="formulas and markup", name="a.csv", content=f'{HEADER}=cmd(),"<img src=x onerror=alert(1)>"\n', kept=1),
    Case(what="a spreadsheet under .csv", name="a.csv", content=b"PK\x03\x04" + bytes(50), refused="a.csv is a ZIP archive"),
]
