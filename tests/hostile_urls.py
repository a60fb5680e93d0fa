"""Base URLs that mean ill: none may be registered, and nothing may be sent because of one.

`{port}` is where canaries listen, on 127.0.0.2, 127.0.0.3 and ::1. ADDRESSES are what a name must not resolve to.
"""

from __future__ import annotations

ENCODINGS = """
    127.0.0.2 127.0.2 127.2 127.0.0.3 2130706434 2130706435 0x7f000002 0x7F000003 0x7f.0.0.2 0x7f.2
    0x7f.0x0.0x0.0x2 017700000002 0177.0.0.2 0177.2 0177.0.0.0x2 127.0.0.002 127.0.0x0.2
    00000000000000000000000177.0.0.2 0 0.0.0.0 00 0x0 0.0 127.0.0.2. 127.0.0.2.. localhost LocalHost localhost.
    a.b.localhost localhost.localdomain%00 [::1] [0:0:0:0:0:0:0:1] [::0001] [::] [::127.0.0.2]
    [::ffff:127.0.0.2] [::FFFF:7f00:2] [0::ffff:127.0.0.3] [::ffff:0:127.0.0.2] [64:ff9b::127.0.0.2]
    [64:ff9b::7f00:3] [64:ff9b:1::7f00:2] [2002:7f00:2::] [2002:7f00:3::1] [2001:0:7f00:2:0:0:0:0]
    [fe80::1%25lo] [::1%25lo] [::1%lo] [::ffff:127.0.0.2%25lo] [127.0.0.2] [::1 ①②⑦.⓪.⓪.② １２７.０.０.２ ١٢٧.٠.٠.٢
    127。0。0。2 127．0．0．2 127｡0｡0｡2 ⓛⓞⓒⓐⓛⓗⓞⓢⓣ ｌｏｃａｌｈｏｓｔ localhoſt %31%32%37%2e0%2e0%2e2 127%2e0%2e0%2e2
    127.0.0.2%20 127.0.0.2%00 127.0.0.2%09 127.0.0.2%23 127.0.0.2%2f 127.0.0.2%40
"""
METADATA = """
    169.254.169.254 2852039166 0xa9fea9fe 0251.0376.0251.0376 169.254.43518 [::ffff:169.254.169.254]
    [::a9fe:a9fe] [64:ff9b::169.254.169.254] [2002:a9fe:a9fe::] [fd00:ec2::254] [fd20:ce::254] [fe80::a9fe:a9fe]
    100.100.100.200 168.63.129.16 192.0.0.192 169.254.170.2 １６９.254.169.254 169。254。169。254 169.254.169.254.
"""
NOT_PUBLIC = """
    10.0.0.1 10.9.7.1 0x0a000001 172.16.0.1 172.31.255.255 192.168.0.1 3232235521 100.64.0.1 198.18.0.1
    192.0.2.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 192.88.99.1 192.0.0.8
    [fc00::1] [fd12::1] [fec0::1] [ff02::1] [ff05::2] [2001:db8::1] [100::1] [64:ff9b::10.0.0.1] [2002:0a00:1::]
    [::ffff:10.0.0.1] [::ffff:192.168.1.1]
"""
SHAPES = [
    "https://teacher.example@127.0.0.2:{port}",
    "https://teacher.example:443@127.0.0.2:{port}/",
    "https://127.0.0.2:{port}@teacher.example",
    "https://user:pass@127.0.0.2:{port}",
    "https://@127.0.0.2:{port}",
    "https://:@127.0.0.2:{port}",
    "https://teacher.example%40127.0.0.2:{port}",
    "https://teacher.example\\@127.0.0.2:{port}",
    "https://127.0.0.2:{port}\\@teacher.example",
    "https://127.0.0.2:{port}\\.teacher.example",
    "https:\\\\127.0.0.2:{port}",
    "https:/\\127.0.0.2:{port}",
    "https://teacher.example#@127.0.0.2:{port}/",
    "https://127.0.0.2:{port}#.teacher.example",
    "https://teacher.example?@127.0.0.2:{port}/",
    "https://127.0.0.2:{port}?.teacher.example",
    "https://127.0.0.2:{port};.teacher.example",
    "https://teacher.example&@127.0.0.2:{port}",
    "https://teacher.example 127.0.0.2:{port}",
    "https://127.0.0.2:{port} .teacher.example",
    " https://127.0.0.2:{port}",
    "https://127.0.0.2:{port} ",
    "https://127.0.0.2\t:{port}",
    "https://127.0.0.2:{port}\r\nHost: teacher.example",
    "https://127.0.0.2:{port}\n",
    "ht\ntps://127.0.0.2:{port}",
    "https://127.0.0.2:{port}\x00.teacher.example",
    "https://127.0.0.2:{port}\u200b",
    "https://\u202e127.0.0.2:{port}",
    "//127.0.0.2:{port}",
    "///127.0.0.2:{port}",
    "https:127.0.0.2:{port}",
    "https:///127.0.0.2:{port}",
    "https:////127.0.0.2:{port}",
    "127.0.0.2:{port}",
    "https//127.0.0.2:{port}",
    "HTTPS://127.0.0.2:{port}",
    "hTTp://127.0.0.2:{port}",
    "http://127.0.0.2:{port}",
    "http://localhost:{port}",
    "http://[::1]:{port}",
    "http://[::ffff:127.0.0.2]:{port}",
    "http://8.8.8.8",
    "ftp://127.0.0.2:{port}",
    "file:///etc/passwd",
    "file://127.0.0.2:{port}/etc/passwd",
    "gopher://127.0.0.2:{port}/_GET",
    "dict://127.0.0.2:{port}/x",
    "ldap://127.0.0.2:{port}",
    "jar:https://127.0.0.2:{port}!/",
    "data:text/plain,x",
    "javascript:alert(1)",
    "unix:///run/docker.sock",
    "http+unix://%2Frun%2Fdocker.sock",
    "ws://127.0.0.2:{port}",
    "netdoc:///etc/passwd",
    "https://8.8.8.8:22",
    "https://8.8.8.8:25",
    "https://8.8.8.8:80",
    "https://8.8.8.8:6379",
    "https://8.8.8.8:8265",
    "https://8.8.8.8:11211",
    "https://8.8.8.8:0",
    "https://8.8.8.8:65536",
    "https://8.8.8.8:-1",
    "https://8.8.8.8:443:{port}",
    "https://8.8.8.8:٤٤٣",
    "https://8.8.8.8:4_43",
    "https://256.1.1.1",
    "https://1.2.3.4.5",
    "https://*",
    "https://*.example",
    "https://a..example",
    "https://.example",
    "https://" + "a" * 64 + ".example",
    "https://[",
    "https://]",
    "https://[]",
    "https://",
    "",
]
URLS = [
    *(f"https://{host}:{{port}}/v1" for host in ENCODINGS.split()),
    *(f"https://{host}/latest/meta-data" for host in METADATA.split()),
    *(f"http://{host}" for host in METADATA.split()[:3]),
    *(f"https://{host}" for host in NOT_PUBLIC.split()),
    *SHAPES,
]
ADDRESSES = """
    127.0.0.2 127.0.0.3 ::1 ::ffff:127.0.0.2 ::127.0.0.3 64:ff9b::7f00:2 2002:7f00:3:: 0.0.0.0 :: 10.0.0.1
    169.254.169.254 ::ffff:a9fe:a9fe 64:ff9b::a9fe:a9fe fd00:ec2::254 fe80::1%lo 224.0.0.1 ff02::1 240.0.0.1
    255.255.255.255 192.0.0.8 100.64.0.1 fc00::1 fec0::1 168.63.129.16
"""
