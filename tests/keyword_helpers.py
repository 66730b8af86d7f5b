"""Makes images and XMP packets with keywords."""

from PIL import Image

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
 xmlns:digiKam="http://www.digikam.org/ns/1.0/" xmlns:optsg="urn:x-optsg:1.0/">{}</rdf:Description>
</rdf:RDF></x:xmpmeta>"""


def xmp(**lists):
    properties = (
        f"<{name.replace('_', ':')}><rdf:Bag>{''.join(f'<rdf:li>{text}</rdf:li>' for text in texts)}</rdf:Bag>"
        f"</{name.replace('_', ':')}>"
        for name, texts in lists.items()
    )
    return XMP.format("".join(properties))


def save_image(path, **options):
    Image.new("RGB", (40, 30), "red").save(path, **options)
    return path
