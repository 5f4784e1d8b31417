"""Every picture is opened in one way: upright, scaled to its range, on white, and what is broken is one line."""

import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from lavis_lstp.data import pictures
from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.pictures import BROKEN, FORMATS, open_picture, picture_size
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.video.picture_folder import pictures_in
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError, VideoError
from webdataset_tools.verify import check_decodable


def stored(picture: Image.Image, form: str, **options) -> bytes:
    raw = io.BytesIO()
    picture.save(raw, form, **options)
    return raw.getvalue()


def noise(width=80, height=60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def row(raw: bytes) -> list[int]:
    """The first line of a grey picture."""
    pixels = np.asarray(open_picture(raw, "x"))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.fixture
def lenient(monkeypatch):
    """What importing LAVIS does to PIL."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP"])
def test_a_cut_off_picture_is_refused_everywhere_though_lavis_made_pil_lenient(form, lenient, tmp_path):
    raw = stored(noise(800, 600), form)
    assert open_picture(raw, "x").size == (800, 600)
    file = tmp_path / f"folder/1.{'png' if form == 'PNG' else 'jpg'}"
    file.parent.mkdir()
    file.write_bytes(raw[: len(raw) // 3])
    for read in (
        lambda: open_picture(file, "x"),
        lambda: open_picture(file.read_bytes(), "x"),
        lambda: read_frames(file.parent, num=1),
        lambda: check_decodable("image", file.read_bytes(), "x", 1),
    ):
        with pytest.raises(VideoError, match="cannot be read as a picture") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # whoever set it has it back


def test_switches_of_pil_are_set_aside_for_threads_that_overlap(lenient):
    raw, problems = stored(noise(400, 300), "JPEG"), []

    def work(content: bytes, whole: bool):
        for _ in range(30):
            try:
                open_picture(content, "x")
                seen = True
            except VideoError:
                seen = False
            if seen is not whole:
                problems.append(content[:4])

    threads = [threading.Thread(target=work, args=(raw[: len(raw) // (1 + n % 2)], n % 2 == 0)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and ImageFile.LOAD_TRUNCATED_IMAGES is True


def pages(*kinds: dict[int, int]) -> bytes:
    """A TIFF whose first page is 4 x 4 and the others 8 x 8 px, of these tags."""
    stream = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(stream) as writer:
        for side, tags in zip((4, *[8] * len(kinds)), kinds, strict=False):
            Image.new("RGB", (side, side)).save(writer, "TIFF", tiffinfo=tags)
            writer.newFrame()
    return stream.getvalue()


@pytest.mark.parametrize("preview", [{254: 1}, {255: 2}])
def test_a_preview_in_front_of_the_picture_is_passed_over(preview):
    """Camera raws and some scanners begin with a small copy; a first page of several is a picture."""
    both = pages(preview, {254: 0})
    assert open_picture(both, "x").size == picture_size(both, "x") == (8, 8)
    assert open_picture(pages({254: 2}, {254: 2}), "x").size == (4, 4)
    for opens in (open_picture, picture_size):
        with pytest.raises(VideoError, match=r"^x.dng: only a preview .*; export it as JPEG or PNG$"):
            opens(pages(preview), "x.dng")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_camera_is_applied(orientation, form):
    wanted = np.zeros((32, 48, 3), np.uint8)
    wanted[:16, :24], wanted[:16, 24:], wanted[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it so
    picture = Image.fromarray(wanted)
    if orientation in undo:
        picture = picture.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = stored(picture, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    shown = np.asarray(open_picture(raw, "x")).astype(int)
    assert shown.shape == wanted.shape and picture_size(raw, "x") == (48, 32)
    corners = np.s_[4::24, 4::40]
    assert abs(shown[corners] - wanted[corners]).max() < 30


@pytest.mark.parametrize("scale", [1, 256, 257])
def test_a_colour_table_of_8_bits_in_a_tiff_is_read_as_one(scale):
    """TIFF's tables have 16 bits; some writers do not scale the 8 that they have."""
    picture = Image.new("P", (4, 4), 3)
    picture.putpalette(bytes(range(256)) * 3)
    raw = stored(picture, "TIFF")
    with Image.open(io.BytesIO(raw)) as saved:
        written = struct.pack("<768H", *saved.tag_v2[320])
    table = np.zeros((3, 256), "<u2")
    table[:, 3] = 20, 60, 230
    assert raw.count(written) == 1
    raw = raw.replace(written, (table * scale).astype("<u2").tobytes())
    assert np.asarray(open_picture(raw, "x"))[0, 0].tolist() == [20, 60, 230]


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}/></rdf:RDF></x:xmpmeta>'
)
IN_XMP = [
    'tiff:Orientation="6"',
    "tiff:Orientation='6'",
    'tiff:Orientation = "6"',
    "><tiff:Orientation> 6 </tiff:Orientation></rdf:Description><rdf:Description",
]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("place", ["ahead of the pixels", "behind them"])
@pytest.mark.parametrize("note", [*IN_XMP, "eXIf", "Raw profile"])
def test_a_png_is_turned_wherever_its_orientation_stands(note, place):
    """Writers of notes put them behind the pixels too, where a header's reader never comes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = b"\nexif\n%8d\n%s\n" % (len(exif.tobytes()), exif.tobytes().hex().encode())
    if note == "eXIf":
        chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    elif note == "Raw profile":
        chunk = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    else:
        chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(note).encode())
    raw = stored(Image.new("RGB", (48, 32)), "PNG")
    at = 33 if place == "ahead of the pixels" else raw.index(b"IEND") - 4
    raw = raw[:at] + chunk + raw[at:]
    assert open_picture(raw, "x").size == picture_size(raw, "x") == (32, 48)


@pytest.mark.parametrize("note", IN_XMP)
@pytest.mark.parametrize("form", ["JPEG", "TIFF", "WEBP"])
def test_other_pictures_are_turned_by_their_xmp(form, note):
    xmp = XMP.format(note).encode()
    notes = {"tiffinfo": {700: xmp}} if form == "TIFF" else {"xmp": xmp}
    raw = stored(Image.new("RGB", (48, 32)), form, **notes)
    assert open_picture(raw, "x").size == picture_size(raw, "x") == (32, 48)


def test_an_orientation_stored_as_a_byte_counts():
    block = b"Exif\0\0II" + struct.pack("<HLHHHL4sL", 42, 8, 1, 0x112, 1, 1, b"\6\0\0\0", 0)
    raw = stored(Image.new("RGB", (48, 32)), "JPEG", exif=block)
    assert open_picture(raw, "x").size == picture_size(raw, "x") == (32, 48)


def test_a_damaged_exif_block_costs_the_orientation_alone(caplog):
    raw = stored(noise(), "PNG", exif=b"Exif\0\0XX damaged")
    assert np.array_equal(np.asarray(open_picture(raw, "x")), np.asarray(noise()))
    assert "x: its EXIF block cannot be read" in caplog.text


def ramp(dtype, most, least=0.0) -> Image.Image:
    return Image.fromarray(np.linspace(least, most, 6).astype(dtype)[None].repeat(4, 0))


RAMP = [0, 51, 102, 153, 204, 255]


@pytest.mark.parametrize(
    "raw",
    [
        stored(ramp(np.uint16, 65535), "PNG"),
        stored(ramp(np.uint16, 65535), "TIFF"),
        stored(Image.fromarray(np.linspace(0, 65535, 6).astype(">u2")[None].repeat(4, 0)), "TIFF"),
        stored(ramp(np.float32, 1), "TIFF"),
        stored(ramp(np.float32, 255), "TIFF"),
        stored(ramp(np.float32, 65535), "TIFF"),
        stored(ramp(np.int32, 255), "TIFF"),
        stored(ramp(np.int32, 65535), "TIFF"),
        stored(ramp(np.uint8, 255), "PNG"),
        stored(ramp(np.uint8, 255).convert("P"), "PNG"),
        stored(ramp(np.uint8, 255).convert("P"), "GIF"),
        stored(ramp(np.uint8, 255).convert("LA"), "PNG"),
        stored(ramp(np.uint8, 255).convert("RGB").convert("CMYK"), "TIFF"),
        stored(ramp(np.uint8, 255), "PPM"),
        b"P5 6 1 65535\n" + np.linspace(0, 65535, 6).astype(">u2").tobytes(),
    ],
    ids="png16 tiff16 tiff16b f1 f255 f65535 i255 i65535 l p gif la cmyk ppm ppm16".split(),
)
def test_every_mode_is_scaled_to_its_range(raw):
    assert np.abs(np.array(row(raw)) - RAMP).max() <= 1


@pytest.mark.parametrize(
    "values", [ramp(np.float32, 3.5, -1.5), ramp(np.float32, 1e6), ramp(np.int32, 2**30), ramp(np.int32, 5, -5)]
)
def test_values_of_no_known_range_are_refused_unless_the_file_states_it(values):
    """Stretched by its own values, each frame of a video would have another white."""
    with pytest.raises(VideoError, match="^x: .*nothing says which is black .* SMaxSampleValue"):
        open_picture(stored(values, "TIFF"), "x")
    least, most = (float(value) for value in np.asarray(values)[0, [0, -1]])
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, least), (341, most)):
        tags[tag], tags.tagtype[tag] = value, 12
    assert np.abs(np.array(row(stored(values, "TIFF", tiffinfo=tags))) - RAMP).max() <= 1
    tags[341] = 2 * most - least
    dark = row(stored(values, "TIFF", tiffinfo=tags))
    assert np.abs(np.array(dark) - np.array(RAMP) / 2).max() <= 1


def test_a_range_that_no_file_states_is_said_once(caplog):
    pictures._say_once.cache_clear()
    for _ in range(3):
        row(stored(ramp(np.float32, 255), "TIFF"))
        row(stored(ramp(np.float32, 1), "TIFF"))
    assert [record.getMessage() for record in caplog.records] == [
        "pictures of floats whose files state no range are read with 255 as white"
    ]


def tiff(
    values: list[int], bits: int, *, white_is_zero: bool = False, signed: bool = False, big: bool = False
) -> bytes:
    """A TIFF of one line, written by hand: PIL writes no 12 bits and no signed 16."""
    if bits == 12:
        text = "".join(f"{value:012b}" for value in values)
        body = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    else:
        body = np.array(values).astype((">" if big else "<") + ("i2" if signed else "u2")).tobytes()
    entries = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    entries += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, 1), (279, len(body)), (339, 2 if signed else 1)]
    order = ">" if big else "<"
    table = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    head = (b"MM" if big else b"II") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", len(entries)) + table + bytes(4) + body


@pytest.mark.parametrize(
    "raw, wanted",
    [
        (tiff([0, 819, 1638, 2457, 3276, 4095], 12), RAMP),
        (tiff([0, 13107, 26214, 39321, 52428, 65535], 16), RAMP),
        (tiff([0, 13107, 26214, 39321, 52428, 65535], 16, big=True), RAMP),
        (tiff([0, 13107, 26214, 39321, 52428, 65535], 16, white_is_zero=True), RAMP[::-1]),
        (tiff([0, 6553, 13107, 19660, 26214, 32767], 16, signed=True), RAMP),
        (tiff([0, 6553, 13107, 19660, 26214, 32767], 16, signed=True, big=True), RAMP),
        (tiff([0, 50, 60, 70, 80, 100], 12), [0, 3, 4, 4, 5, 6]),  # dark stays dark
    ],
    ids="12 16 16big 16inverse signed signedbig 12dark".split(),
)
def test_tiffs_of_other_cameras(raw, wanted):
    assert np.abs(np.array(row(raw)) - wanted).max() <= 1


@pytest.mark.parametrize(
    "raw",
    [tiff([0, 4095], 12, white_is_zero=True), tiff([-5, 9], 16, signed=True), tiff([0, 4095], 12, big=True)],
    ids="12inverse signed-negative 12big".split(),
)
def test_what_pil_does_not_know_is_refused_in_a_line(raw):
    with pytest.raises(VideoError, match="^x: cannot be read as a picture") as caught:
        open_picture(raw, "x")
    assert "\n" not in str(caught.value)


def test_a_kind_of_a_format_that_is_not_read_is_called_by_the_format(tmp_path):
    """PIL says of a TIFF of two channels of 16 bits what it says of a text."""
    known = tiff([0, 7, 8, 9], 16)
    raw = known.replace(struct.pack("<HHIHH", 277, 3, 1, 1, 0), struct.pack("<HHIHH", 277, 3, 1, 2, 0))
    assert raw != known
    (tmp_path / "a.tif").write_bytes(raw)
    (tmp_path / "a.jpg").write_text("<html>not found</html>")
    for source in (raw, tmp_path / "a.tif"):
        with pytest.raises(VideoError, match=r"^x: .*begins as TIFF, .*kind that is not read\); save it again as JPEG"):
            picture_size(source, "x")
    with pytest.raises(VideoError, match=r"^x: .*none of BMP, GIF, .*convert it to one$"):
        open_picture(tmp_path / "a.jpg", "x")


@pytest.mark.parametrize("kind", ["profile", "itxt", "ztxt"])
def test_a_png_with_megabytes_of_notes_is_read(kind):
    """Generators of pictures keep their settings there, printers their colours; PIL stops at one megabyte."""

    def png_with(size: int) -> bytes:
        notes = PngImagePlugin.PngInfo()
        if kind == "itxt":
            notes.add_itxt("workflow", "x" * size, zip=True)
        elif kind == "ztxt":
            notes.add_text("workflow", "x" * size, zip=True)
        return stored(noise(), "PNG", pnginfo=notes, icc_profile=bytes(size) if kind == "profile" else None)

    before = PngImagePlugin.MAX_TEXT_CHUNK
    assert picture_size(png_with(5_000_000), "x") == (80, 60)
    assert np.array_equal(open_picture(png_with(5_000_000), "x"), noise())
    with pytest.raises(VideoError, match=r"^x: .*notes or its colour profile are of more than 64 MB; save it without"):
        open_picture(png_with(70_000_000), "x")
    assert before == PngImagePlugin.MAX_TEXT_CHUNK


@pytest.mark.parametrize("pages", [1, 2])
def test_a_tiff_of_uncompressed_ycbcr_is_refused(pages):
    """PIL reads a byte too many for each pixel: such a file is cut off for it, or goes on in the next page."""
    pixels = np.full((8, 8, 3), (100, 120, 140), np.uint8)
    picture = Image.fromarray(pixels).convert("YCbCr")
    more = {"save_all": True, "append_images": [picture] * (pages - 1), "icc_profile": bytes(6000)}
    for read in (open_picture, picture_size):
        with pytest.raises(VideoError, match="^x: is a TIFF of uncompressed YCbCr, .*save it as RGB, or compressed$"):
            read(stored(picture, "TIFF", compression="raw", **more), "x")
    packed = np.asarray(open_picture(stored(picture, "TIFF", compression="tiff_lzw", **more), "x"))
    assert np.abs(packed.astype(int) - pixels).max() <= 2


def test_two_colours_and_numbers_that_are_none():
    assert row(stored(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "PNG")) == [0, 255]
    with pytest.raises(VideoError, match="not finite"):
        open_picture(stored(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), "x")


@pytest.mark.parametrize(
    "picture, options",
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}),
        (Image.new("LA", (4, 4), (0, 0)), {}),
        (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}),
        (Image.new("L", (4, 4), 7), {"transparency": 7}),
        (Image.new("P", (4, 4), 0), {"transparency": 0}),
        (Image.fromarray(np.full((4, 4), 900, np.uint16)), {"transparency": 900}),
    ],
    ids=["rgba", "la", "rgb", "l", "p", "i16"],
)
def test_what_is_transparent_is_white(picture, options):
    assert (np.asarray(open_picture(stored(picture, "PNG", **options), "x")) == 255).all()


def png(bits: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of two pixels, of which `clear` names the colour that is transparent."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", clear) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("bits", "colour", "pixels", "clear", "wanted"),
    [
        (1, 0, b"\x80", b"\0\1", 0),
        (2, 0, b"\x60", b"\0\1", 170),
        (4, 0, b"\x12", b"\0\1", 34),
        (8, 0, b"\x07\x08", b"\0\7", 8),
        (16, 0, b"\x12\x34\x12\x35", b"\x12\x34", 18),
        (8, 2, b"\7\7\7\x09\x09\x09", b"\0\7\0\7\0\7", 9),
    ],
)
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(bits, colour, pixels, clear, wanted):
    assert row(png(bits, colour, pixels, clear)) == [255, wanted]


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    """PIL keeps eight of them, which other colours have, too."""
    with pytest.raises(VideoError, match="^x: .*16 bits is transparent in it; store it with 8 bits"):
        open_picture(png(16, 2, b"\7\1" * 3 + b"\x09\1" * 3, b"\7\1" * 3), "x")


@pytest.mark.parametrize(
    ("alpha", "wanted"), [((0, 0), (255, 0, 0)), ((255, 0), (255, 0, 0)), ((0, 255), (255, 255, 255))]
)
def test_a_bmp_whose_alpha_is_unused_is_shown(alpha, wanted):
    """A program that writes no alpha leaves it at 0, under a header that has it; here are two red pixels."""
    pixels = b"".join(bytes((0, 0, 255, value)) for value in alpha)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII4I", 56, 2, 1, 1, 32, 3, len(pixels), 2835, 2835, 0, 0, *masks)
    raw = b"BM" + struct.pack("<IHHI", 14 + 56 + len(pixels), 0, 0, 14 + 56) + info + pixels
    assert Image.open(io.BytesIO(raw)).mode == "RGBA"
    assert open_picture(raw, "x").getpixel((0, 0)) == wanted


def test_half_transparent_is_half_white():
    half = open_picture(stored(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"), "x")
    assert np.abs(np.asarray(half)[0, 0].astype(int) - [255, 127, 127]).max() <= 1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def empty_png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(30000, 30000), (8001, 8000), (12000, 9000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_too_large_an_area_is_one_line(width, height):
    for look in (open_picture, picture_size):
        with pytest.raises(VideoError, match="^x: .* max_megapixels.*make it smaller") as caught:
            look(empty_png(width, height), "x")
        assert "\n" not in str(caught.value)


def test_the_limit_is_the_users(tmp_path):
    raw = stored(Image.new("L", (400, 300)), "PNG")
    assert open_picture(raw, "x", max_megapixels=0.12).size == (400, 300)
    with pytest.raises(VideoError, match="400 x 300 px, more than max_megapixels: 0.1 allows"):
        open_picture(raw, "x", max_megapixels=0.1)
    (tmp_path / "clip").mkdir()
    for place in ("a.png", "clip/1.png"):
        (tmp_path / place).write_bytes(raw)
    texts = {"question": "q", "answer": "a"}
    rows = [{"question_id": "1", "video_id": "a", "image": "a.png", **texts}]
    rows += [{"question_id": "2", "video_id": "c", "video": "clip", **texts}]
    whole = VideoQADataset(rows, tmp_path, image_size=8)
    assert whole[0]["frames"].shape == whole[1]["frames"].shape == (1, 3, 8, 8)
    small = VideoQADataset(rows, tmp_path, image_size=8, max_megapixels=0.1, max_bad_fraction=1.0)
    assert small[0] is None and small[1] is None and small.left_out.by_cause() == {"undecodable": 2}
    for wrong in (0, -1, "many", float("nan"), float("inf"), True):
        with pytest.raises(ConfigError, match="max_megapixels must be a number above 0"):
            VideoQADataset(rows, tmp_path, max_megapixels=wrong)
    with pytest.raises(VideoError, match="PIL|exceeds|max_megapixels"):  # more than PIL allows by itself
        open_picture(empty_png(30000, 30000), "x", max_megapixels=100)
    with pytest.raises(VideoError, match="truncated|cannot be read as a picture"):
        open_picture(empty_png(15000, 15000)[:60], "x", max_megapixels=300)


def test_a_postscript_file_called_jpg_goes_to_no_interpreter(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("PIL called Ghostscript"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(eps)
    assert "EPS" not in FORMATS
    with pytest.raises(VideoError, match="cannot be read as a picture"):
        open_picture(tmp_path / "a.jpg", "a.jpg")


def test_nothing_at_all_is_called_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    for source in (b"", tmp_path / "a.jpg"):
        with pytest.raises(VideoError, match=r"^x: empty \(0 bytes\), expected a picture$"):
            open_picture(source, "x")


def test_whatever_is_wrong_with_a_file_is_one_line():
    """Bytes of whole pictures changed, removed and doubled at random: a picture, or a `VideoError`."""
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [stored(noise(24, 16), form, exif=exif) for form in ("JPEG", "PNG", "TIFF", "WEBP")]
    forms += [stored(noise(24, 16), "GIF"), stored(noise(24, 16), "BMP"), stored(ramp(np.float32, 1), "TIFF")]
    read = 0
    for number in range(700):
        raw = bytearray(forms[number % len(forms)])
        for _ in range(int(rng.integers(1, 6))):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        if number % 3 == 0:
            raw = raw[: int(rng.integers(1, len(raw)))]
        try:
            assert open_picture(bytes(raw), "x", max_megapixels=1).mode == "RGB"
            read += 1
        except VideoError as error:
            assert "\n" not in str(error) and str(error).startswith("x: ")
    assert 50 < read < 650
    assert not any(issubclass(LstpError, kind) for kind in BROKEN if kind is not Exception)


def test_folders_of_pictures_are_in_natural_order(tmp_path):
    names = ["f1.png", "f2.webp", "f09.bmp", "f9b.TIF", "f10.tiff", "f99.ppm", "f100.jpg", "g1.png"]
    for name in names[::-1]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "._f1.png").write_bytes(b"")
    assert [path.name for path in pictures_in(tmp_path)] == names


@pytest.mark.parametrize(
    "names",
    [
        *("-1.0 -0.5 0.0 0.5 1.0", "-2 -1 0 1 2", "0.05 0.1 0.15 0.2", "0 0.04 0.08 0.12 0.2", "1.00 1.05 1.10 1.2"),
        *("t0.25s t0.5s t1.0s t10.0s", "x=1.10000000439538 x=1.5000000059937", "clip-1.5 clip-10.25"),
        # the second number counts by itself, a hyphen parts, and equal numbers have no order of their own
        *("1.8 1.9 1.10 1.11", "frame-1 frame-2 frame-10", "-1 -2 -3", "1.1 1.2 1.10", "v1.2_1 v1.2_2 v1.2_10"),
    ],
)
def test_names_that_differ_in_a_decimal_number_are_in_its_order(tmp_path, names):
    for name in names.split()[::-1]:
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert [path.stem for path in pictures_in(tmp_path)] == names.split()


@pytest.mark.parametrize(
    "names",
    [["0.png", "0.5.png", "1.png", "1.5.png", "2.jpg", "10.png", "10.5.png"], ["i.png", "i (1).png", "i (10).png"]],
)
def test_a_name_comes_before_those_that_go_on_from_it(tmp_path, names):
    for name in names[::-1]:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in pictures_in(tmp_path)] == names


@pytest.mark.parametrize("odd", ["f2.gif", "f2.HEIC", "f2.avif", "f2.CR2", "f2.tga", "f2.apng"])
def test_a_folder_with_pictures_that_would_be_left_out_is_refused(tmp_path, odd):
    for name in ("f1.png", "f3.png", "notes.txt"):
        (tmp_path / name).write_bytes(stored(noise(), "PNG"))
    (tmp_path / odd.replace("f2", "f1")).write_bytes(b"")  # the same picture beside one that is read
    assert len(pictures_in(tmp_path)) == 2
    (tmp_path / odd).write_bytes(b"")
    for call in (pictures_in, lambda folder: read_frames(folder, num=1)):
        with pytest.raises(VideoError, match=f"{odd}: is not read in a folder of pictures; take it away, or convert"):
            call(tmp_path)


@pytest.mark.parametrize(
    ("ending", "form"),
    [(".jfif", "JPEG"), (".JPE", "JPEG"), (".dib", "BMP"), (".pbm", "PPM"), (".pnm", "PPM"), (".webp", "WEBP")],
)
def test_every_ending_of_a_format_is_a_frame(tmp_path, ending, form):
    for number, grey in enumerate((0, 255, 0), 1):
        picture = Image.new("1" if ending == ".pbm" else "L", (8, 6), grey)
        form_here, ending_here = (form, ending) if number == 2 else ("PNG", ".png")
        (tmp_path / f"f{number}{ending_here}").write_bytes(stored(picture, form_here))
    assert read_frames(tmp_path, num=3).frames[:, 0, 3, 3].tolist() == [0, 255, 0]


def test_frames_of_a_folder_come_in_that_order(tmp_path):
    for number in range(1, 13):
        form = {3: "bmp", 5: "tif", 7: "webp", 8: "ppm"}.get(number, "png")
        Image.new("L", (8, 8), 20 * number).save(tmp_path / f"frame_{number}.{form}")
    shown = read_frames(tmp_path, num=12).frames[:, 0, 0, 0] // 20
    assert shown.tolist() == list(range(1, 13))
    listed = [path.read_bytes() for path in pictures_in(tmp_path)]
    for source, name in ((tmp_path, None), (listed, "pictures")):
        by_time = read_frames(source, times_s=[3.9, 0.0, 1.0], name=name)  # three a second
        assert (by_time.frames[:, 0, 0, 0] // 20).tolist() == [12, 1, 4] and by_time.indices == [11, 0, 3]
        assert (read_frames(source, indices=[11, 2], name=name).frames[:, 0, 0, 0] // 20).tolist() == [12, 3]
        with pytest.raises(VideoError, match="no frame 12, it has 12 frames"):
            read_frames(source, indices=[12], name=name)


def test_json_of_left_out_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(empty_png(30000, 30000))
    rows = [{"question_id": "1", "video_id": "a", "image": "a.png", "question": "q", "answer": "a"}]
    data = VideoQADataset(rows, tmp_path, image_size=8, max_bad_fraction=1.0, quarantine=tmp_path / "bad.jsonl")
    assert data[0] is None
    line = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))
    assert line["cause"] == "undecodable" and line["file"] == "a.png"


@pytest.mark.parametrize("key", ["video", "image"])
@pytest.mark.parametrize("path", ["", ".", "./", " ", "/"])
def test_the_media_folder_itself_is_no_medium(key, path, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "unrelated.png")
    entry = {"question_id": "1", "video_id": "v", key: path, "question": "q", "answer": "a"}
    (tmp_path / "a.json").write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(AnnotationError, match=f"a.json, entry 0 .*'{key}' must name a file"):
        read_annotation(tmp_path / "a.json")
    with pytest.raises(AnnotationError, match="expected the path of a file|leads out"):
        VideoQADataset([entry], tmp_path)


def folder_of(count: int, path):
    """A video of `count` / 3 seconds."""
    path.mkdir()
    for number in range(count):
        Image.new("L", (8, 8), number).save(path / f"{number}.png")


@pytest.mark.parametrize("key", ["clip_s", "span_s"])
def test_seconds_outside_of_the_video_are_an_error(key, tmp_path):
    folder_of(12, tmp_path / "v")
    entry = {"question_id": "q7", "video_id": "v", "video": "v", "question": "q", "answer": "a"}
    for wrong in ([100, 200], [4, 4.5], [1, 5.5], [0, 1e6]):
        with pytest.raises(VideoError, match=rf"'q7': .*v: '{key}' \[.*\] lies outside .* lasts 4.000 s"):
            VideoQADataset([{**entry, key: wrong}], tmp_path, image_size=8)[0]
    for fine in ([0, 4], [3.9, 4], [2, 4.9]):  # annotators round
        assert VideoQADataset([{**entry, key: fine}], tmp_path, image_size=8)[0] is not None
    data = VideoQADataset([{**entry, key: [100, 200]}], tmp_path, image_size=8, max_bad_fraction=1.0)
    assert data[0] is None and data.left_out.by_cause() == {"undecodable": 1}


@pytest.mark.parametrize(
    "span", ["[0, 1e999]", "[NaN, 1]", "[0, Infinity]", "[2, 1]", "[1, 1]", "[-1, 2]", "[0, true]"]
)
@pytest.mark.parametrize("key", ["clip_s", "span_s"])
def test_spans_that_are_none(key, span, tmp_path):
    text = f'[{{"question_id": "1", "video": "v", "question": "q", "answer": "a", "{key}": {span}}}]'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(AnnotationError, match="a.json, (entry 0|file: not JSON)"):
        read_annotation(tmp_path / "a.json")


def test_a_damaged_picture_is_called_by_a_name_however_it_is_given(predictor):
    """Never by its own bytes, nor by an address in memory."""
    whole = stored(noise(), "JPEG")
    half = whole[: len(whole) // 2]
    for given, name in (
        (half, "<bytes>"),
        (bytearray(half), "<bytearray>"),
        (io.BytesIO(half), "<BytesIO>"),
        ([whole, half], "pictures, picture 1"),
        ((whole, half), "pictures, picture 1"),
    ):
        with pytest.raises(VideoError) as caught:
            predictor.answer(given, "What is shown?")
        assert str(caught.value).startswith(f"{name}: cannot be read as a picture") and len(str(caught.value)) < 200
