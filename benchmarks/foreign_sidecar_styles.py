"""XMP sidecars in the form in which ten programs write them: namespaces, structure, quotes, comments and padding.

All contents are synthetic. They imitate the formats of the programs; none was written by
the program itself.
"""

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
BEGIN = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
PADDING = ("\n" + " " * 99) * 20

DARKTABLE = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
    xmlns:darktable="http://darktable.sf.net/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
   exif:GPSLatitude="47,39.9000000N"
   exif:GPSLongitude="9,10.5000000E"
   exif:DateTimeOriginal="2019:04:21 10:11:12.000"
   xmp:Rating="4"
   xmpMM:DerivedFrom="photo.jpg"
   darktable:xmp_version="5"
   darktable:raw_params="0"
   darktable:auto_presets_applied="1"
   darktable:history_end="2">
   <darktable:masks_history>
    <rdf:Seq/>
   </darktable:masks_history>
   <darktable:history>
    <rdf:Seq>
     <rdf:li
      darktable:num="0"
      darktable:operation="crop"
      darktable:enabled="1"
      darktable:modversion="1"
      darktable:params="0000003dcdcccc3d0000803f6666663fffffffffffffffff"
      darktable:multi_name=""
      darktable:multi_priority="0"/>
     <rdf:li
      darktable:num="1"
      darktable:operation="exposure"
      darktable:enabled="1"
      darktable:modversion="6"
      darktable:params="gz02eJxjYGBgYAFiCQYYOOHEgAZY0QVwggZ7CB6pfNoAAE=&#x2b;"
      darktable:multi_name="sky &amp; sea"
      darktable:multi_priority="0"/>
    </rdf:Seq>
   </darktable:history>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Grandma's garden</rdf:li>
     <rdf:li>Konstanz</rdf:li>
     <rdf:li>darktable|exported</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Family|Grandma's garden</rdf:li>
     <rdf:li>Places|Europe|Konstanz</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <darktable:colorlabels>
    <rdf:Seq>
     <rdf:li>2</rdf:li>
    </rdf:Seq>
   </darktable:colorlabels>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

DIGIKAM = f"""{BEGIN}
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:digiKam="http://www.digikam.org/ns/1.0/"
    xmlns:MicrosoftPhoto="http://ns.microsoft.com/photo/1.0/"
    xmlns:acdsee="http://ns.acdsee.com/iptc/1.0/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:mediapro="http://ns.iview-multimedia.com/mediapro/1.0/"
    xmlns:mwg-rs="http://www.metadataworkinggroup.com/schemas/regions/"
    xmlns:stDim="http://ns.adobe.com/xap/1.0/sType/Dimensions#"
    xmlns:stArea="http://ns.adobe.com/xmp/sType/Area#"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
   digiKam:ColorLabel="3"
   digiKam:PickLabel="0"
   MicrosoftPhoto:Rating="75"
   acdsee:rating="4"
   acdsee:categories="&lt;Categories&gt;&lt;Category Assigned=&quot;0&quot;&gt;People\
&lt;Category Assigned=&quot;1&quot;&gt;Anna&lt;/Category&gt;&lt;/Category&gt;&lt;/Categories&gt;"
   xmp:Rating="4"
   exif:GPSLatitude="47,39.90000000N"
   exif:GPSLongitude="9,10.50000000E">
   <digiKam:TagsList>
    <rdf:Seq>
     <rdf:li>People/Anna</rdf:li>
     <rdf:li>Places/Europe/Konstanz</rdf:li>
    </rdf:Seq>
   </digiKam:TagsList>
   <MicrosoftPhoto:LastKeywordXMP>
    <rdf:Bag>
     <rdf:li>People/Anna</rdf:li>
     <rdf:li>Places/Europe/Konstanz</rdf:li>
    </rdf:Bag>
   </MicrosoftPhoto:LastKeywordXMP>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>People|Anna</rdf:li>
     <rdf:li>Places|Europe|Konstanz</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <mediapro:CatalogSets>
    <rdf:Bag>
     <rdf:li>People|Anna</rdf:li>
     <rdf:li>Places|Europe|Konstanz</rdf:li>
    </rdf:Bag>
   </mediapro:CatalogSets>
   <mwg-rs:Regions rdf:parseType="Resource">
    <mwg-rs:AppliedToDimensions stDim:w="4000" stDim:h="3000" stDim:unit="pixel"/>
    <mwg-rs:RegionList>
     <rdf:Bag>
      <rdf:li>
       <rdf:Description mwg-rs:Name="Anna" mwg-rs:Type="Face">
        <mwg-rs:Area stArea:x="0.5" stArea:y="0.25" stArea:w="0.1" stArea:h="0.125" stArea:unit="normalized"/>
       </rdf:Description>
      </rdf:li>
     </rdf:Bag>
    </mwg-rs:RegionList>
   </mwg-rs:Regions>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Anna</rdf:li>
     <rdf:li>Konstanz</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>{PADDING}
<?xpacket end="w"?>"""

LIGHTROOM = f"""\
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000, 0000/00/00-00:00:00        ">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
    xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
    xmlns:stEvt="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
   xmp:CreatorTool="Adobe Photoshop Lightroom Classic 12.5 (Windows)"
   xmp:Rating="5"
   xmp:Label="Rot"
   photoshop:SidecarForExtension="CR2"
   exif:GPSLatitude="47,39.9N"
   exif:GPSLongitude="9,10.5E"
   crs:HasCrop="True"
   crs:CropTop="0.0523"
   crs:CropLeft="0.1"
   crs:CropBottom="0.95"
   crs:CropRight="0.88"
   crs:CropAngle="-1.2"
   crs:HasSettings="True">
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Easter 2019</rdf:li>
     <rdf:li>Konstanz</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Easter 2019</rdf:li>
     <rdf:li>Places|Europe|Konstanz</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
   <crs:ToneCurvePV2012>
    <rdf:Seq>
     <rdf:li>0, 0</rdf:li>
     <rdf:li>255, 255</rdf:li>
    </rdf:Seq>
   </crs:ToneCurvePV2012>
   <xmpMM:History>
    <rdf:Seq>
     <rdf:li
      stEvt:action="saved"
      stEvt:instanceID="xmp.iid:0c1"
      stEvt:changed="/metadata"/>
    </rdf:Seq>
   </xmpMM:History>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
""".replace("\n", "\r\n")

EXIFTOOL_HEAD = f"""<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>
<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk='Image::ExifTool 12.57'>
<rdf:RDF xmlns:rdf='{RDF}'>
"""
IMMICH = (
    EXIFTOOL_HEAD
    + """
 <rdf:Description rdf:about=''
  xmlns:digiKam='http://www.digikam.org/ns/1.0/'>
  <digiKam:TagsList>
   <rdf:Seq>
    <rdf:li>Family/Grandma&#39;s garden</rdf:li>
    <rdf:li>Konstanz</rdf:li>
   </rdf:Seq>
  </digiKam:TagsList>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:exif='http://ns.adobe.com/exif/1.0/'>
  <exif:DateTimeOriginal>2019-04-21T10:11:12.000+02:00</exif:DateTimeOriginal>
  <exif:GPSLatitude>47,39.9N</exif:GPSLatitude>
  <exif:GPSLongitude>9,10.5E</exif:GPSLongitude>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:tiff='http://ns.adobe.com/tiff/1.0/'>
  <tiff:ImageDescription>
   <rdf:Alt>
    <rdf:li xml:lang='x-default'>By the lake</rdf:li>
   </rdf:Alt>
  </tiff:ImageDescription>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:xmp='http://ns.adobe.com/xap/1.0/'>
  <xmp:Rating>3</xmp:Rating>
 </rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end='w'?>"""
)

PHOTOPRISM = f"""<?xml version="1.0"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 5.4.0">
   <rdf:RDF xmlns:rdf="{RDF}">
      <rdf:Description rdf:about=""
            xmlns:dc="http://purl.org/dc/elements/1.1/"
            xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
            xmlns:xmp="http://ns.adobe.com/xap/1.0/"
            xmlns:exif="http://ns.adobe.com/exif/1.0/"
            xmlns:fstop="http://www.fstopapp.com/xmp/"
            fstop:favorite="1" xmp:Rating="5">
         <dc:title><rdf:Alt><rdf:li xml:lang="x-default">Night Shift / Berlin / 2020</rdf:li></rdf:Alt></dc:title>
         <dc:description><rdf:Alt><rdf:li xml:lang="x-default">Example file</rdf:li></rdf:Alt></dc:description>
         <dc:creator><rdf:Seq><rdf:li>A. Person</rdf:li></rdf:Seq></dc:creator>
         <dc:subject><rdf:Seq><rdf:li>desk</rdf:li><rdf:li>coffee</rdf:li></rdf:Seq></dc:subject>
         <photoshop:DateCreated>2020-01-01T17:28:25</photoshop:DateCreated>
         <exif:GPSLatitude>52,27.5814N</exif:GPSLatitude>
         <exif:GPSLongitude>13,19.31E</exif:GPSLongitude>
      </rdf:Description>
   </rdf:RDF>
</x:xmpmeta>"""

XNVIEW = f"""{BEGIN}
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 5.5.0">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:MicrosoftPhoto="http://ns.microsoft.com/photo/1.0/">
   <xmp:Rating>2</xmp:Rating>
   <xmp:Label>Green</xmp:Label>
   <MicrosoftPhoto:Rating>25</MicrosoftPhoto:Rating>
  </rdf:Description>
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Überlingen</rdf:li>
     <rdf:li>see</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
  <rdf:Description rdf:about=""
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/">
   <lr:hierarchicalSubject>
    <rdf:Bag>
     <rdf:li>Orte|Überlingen</rdf:li>
     <rdf:li>Natur|see</rdf:li>
    </rdf:Bag>
   </lr:hierarchicalSubject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>{PADDING}
<?xpacket end="w"?>"""

CAPTURE_ONE = f"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 5.5.0">
   <rdf:RDF xmlns:rdf="{RDF}">
      <rdf:Description rdf:about=""
            xmlns:dc="http://purl.org/dc/elements/1.1/"
            xmlns:xmp="http://ns.adobe.com/xap/1.0/"
            xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
            xmlns:lightroom="http://ns.adobe.com/lightroom/1.0/"
            xmlns:Iptc4xmpCore="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/">
         <xmp:Rating>1</xmp:Rating>
         <xmp:Label>Red</xmp:Label>
         <photoshop:Urgency>1</photoshop:Urgency>
         <dc:subject>
            <rdf:Bag>
               <rdf:li>studio</rdf:li>
               <rdf:li>Anna</rdf:li>
            </rdf:Bag>
         </dc:subject>
         <lightroom:hierarchicalSubject>
            <rdf:Bag>
               <rdf:li>work|studio</rdf:li>
               <rdf:li>People|Anna</rdf:li>
            </rdf:Bag>
         </lightroom:hierarchicalSubject>
         <Iptc4xmpCore:IntellectualGenre></Iptc4xmpCore:IntellectualGenre>
      </rdf:Description>
   </rdf:RDF>
</x:xmpmeta>"""

ACDSEE = f"""{BEGIN}
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.1.1-Exiv2">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about=""
    xmlns:acdsee="http://ns.acdsee.com/iptc/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/">
   <acdsee:caption>By the lake</acdsee:caption>
   <acdsee:rating>4</acdsee:rating>
   <acdsee:tagged>False</acdsee:tagged>
   <acdsee:categories>&lt;Categories&gt;&lt;Category Assigned="0"&gt;Places&lt;Category Assigned="1"&gt;Konstanz\
&lt;/Category&gt;&lt;/Category&gt;&lt;/Categories&gt;</acdsee:categories>
   <acdsee:keywords>
    <rdf:Bag>
     <rdf:li>Konstanz</rdf:li>
     <rdf:li>winter</rdf:li>
    </rdf:Bag>
   </acdsee:keywords>
   <acdsee:DPP>&lt;Crop l="0.1" t="0.05" r="0.9" b="0.95"/&gt;</acdsee:DPP>
   <xmp:Rating>4</xmp:Rating>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Konstanz</rdf:li>
     <rdf:li>winter</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>{PADDING}
<?xpacket end="w"?>"""

APPLE_PHOTOS = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 6.0.0">
   <rdf:RDF xmlns:rdf="{RDF}">
      <rdf:Description rdf:about=""
            xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
            xmlns:dc="http://purl.org/dc/elements/1.1/"
            xmlns:xmp="http://ns.adobe.com/xap/1.0/"
            xmlns:exif="http://ns.adobe.com/exif/1.0/"
            xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
         <!-- keywords and persons -->
         <photoshop:DateCreated>2019-04-21T10:11:12+02:00</photoshop:DateCreated>
         <dc:description>By the lake</dc:description>
         <dc:subject>
            <rdf:Seq>
               <rdf:li>Grandma's garden</rdf:li>
               <rdf:li>Anna</rdf:li>
            </rdf:Seq>
         </dc:subject>
         <Iptc4xmpExt:PersonInImage>
            <rdf:Bag>
               <rdf:li>Anna</rdf:li>
            </rdf:Bag>
         </Iptc4xmpExt:PersonInImage>
         <xmp:Rating>5</xmp:Rating>
         <exif:GPSLongitude>9.175</exif:GPSLongitude>
         <exif:GPSLatitude>47.665</exif:GPSLatitude>
         <exif:GPSLatitudeRef>N</exif:GPSLatitudeRef>
         <exif:GPSLongitudeRef>E</exif:GPSLongitudeRef>
      </rdf:Description>
   </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""

EXIFTOOL = (
    EXIFTOOL_HEAD
    + """
 <rdf:Description rdf:about=''
  xmlns:dc='http://purl.org/dc/elements/1.1/'>
  <dc:subject>
   <rdf:Bag>
    <rdf:li>one, two</rdf:li>
    <rdf:li>a &lt;b&gt; &amp; c</rdf:li>
   </rdf:Bag>
  </dc:subject>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:crs='http://ns.adobe.com/camera-raw-settings/1.0/'>
  <crs:CropLeft>0.25</crs:CropLeft>
  <crs:HasCrop>True</crs:HasCrop>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:exif='http://ns.adobe.com/exif/1.0/'>
  <exif:GPSLatitude>47,39.9N</exif:GPSLatitude>
  <exif:GPSLongitude>9,10.5E</exif:GPSLongitude>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:lr='http://ns.adobe.com/lightroom/1.0/'>
  <lr:hierarchicalSubject>
   <rdf:Bag>
    <rdf:li>Places|Europe</rdf:li>
   </rdf:Bag>
  </lr:hierarchicalSubject>
 </rdf:Description>

 <rdf:Description rdf:about=''
  xmlns:xmp='http://ns.adobe.com/xap/1.0/'>
  <xmp:Rating>3</xmp:Rating>
 </rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end='w'?>"""
)

# Sidecars by program, as bytes.
STYLES = {
    name: text.encode()
    for name, text in {
        "darktable": DARKTABLE,
        "digiKam": DIGIKAM,
        "Lightroom": LIGHTROOM,
        "Immich": IMMICH,
        "PhotoPrism": PHOTOPRISM,
        "XnView MP": XNVIEW,
        "Capture One": CAPTURE_ONE,
        "ACDSee": ACDSEE,
        "Apple Photos": APPLE_PHOTOS,
        "exiftool": EXIFTOOL,
    }.items()
}
