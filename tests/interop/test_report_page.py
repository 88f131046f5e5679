"""Looks at report.html in headless Chromium: light, dark, and as narrow as a phone. The screenshots stay under build/report/."""
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import zlib

from common import ROOT, WORK, Checks, lua, skip

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not BROWSER:
    skip("there is no chromium here: apt-get install chromium")

SEEN = ROOT / "build" / "report"


def browse(page, *words):
    """Runs the browser without a network, without anything that remains."""
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
                   "--host-resolver-rules=MAP * ~NOTFOUND", *words, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def pixels(path):
    """Width, height and the pixels of a PNG of 8-bit RGB or RGBA, rows unfiltered."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    size = {2: 3, 6: 4}[kind]
    assert depth == 8
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    raw, stride = zlib.decompress(packed), width * size
    before, rows = bytearray(stride), []
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride):
            left, up, corner = line[i - size] if i >= size else 0, before[i], before[i - size] if i >= size else 0
            if kind == 1:
                line[i] = line[i] + left & 255
            elif kind == 2:
                line[i] = line[i] + up & 255
            elif kind == 3:
                line[i] = line[i] + (left + up) // 2 & 255
            elif kind == 4:
                p = left + up - corner
                line[i] = line[i] + min((left, up, corner), key=lambda v: abs(p - v)) & 255
        rows.append(bytes(line))
        before = line
    return width, height, size, rows


def colours(path):
    """The page's own colour, the top left pixel, and how many different ones there are."""
    _, _, size, rows = pixels(path)
    seen = {row[i : i + 3] for row in rows[::3] for i in range(0, len(row), 3 * size)}
    return tuple(rows[0][:3]), len(seen)


def main():
    checks = Checks()
    out = WORK / "page"
    shutil.rmtree(out, ignore_errors=True)
    SEEN.mkdir(parents=True, exist_ok=True)
    lua("board.lua", out)
    page = out / "report.html"

    browse(page, "--window-size=900,700", f"--screenshot={SEEN / 'light.png'}")
    browse(page, "--window-size=900,700", "--blink-settings=preferredColorScheme=0", f"--screenshot={SEEN / 'dark.png'}")
    browse(page, "--window-size=500,1600", f"--screenshot={SEEN / 'phone.png'}")
    light, many = colours(SEEN / "light.png")
    dark, _ = colours(SEEN / "dark.png")
    checks.check(min(light) > 240 and many > 20, f"light: {light}, {many} colours")
    checks.check(max(dark) < 40, f"dark: {dark}")

    # What the browser made of it: every part is there, and a narrow page does not run out at the side.
    probe = pathlib.Path(out / "probe.html")
    script = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script></body>"
    probe.write_text(page.read_text().replace("</body>", script))
    dom = browse(probe, "--window-size=500,1600", "--dump-dom")
    inner, scroll = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    checks.check(scroll <= inner <= 520, f"{inner} wide: the page takes {scroll}")
    checks.check(len(re.findall("<svg", dom)) == 6, "six curves")
    for title in ("Curves", "Samples before and after", "Exports", "Memory plan", "Data set", "Settings"):
        checks.check(f"<h2>{title}</h2>" in dom, title)
    checks.check("http" not in re.sub(r'xmlns="[^"]*"', "", page.read_text()), "nothing from elsewhere")
    loss = browse(out / "loss.svg", "--dump-dom")
    checks.check("<path" in loss, "loss.svg")
    checks.end()


main()
