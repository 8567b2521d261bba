//! Reading a bundle: whatever the bytes are, no panic, and nothing is allocated by what they claim.
//!
//! The first byte tells what the rest is: a whole file; or one member of an otherwise good bundle, whose hash is put
//! right so that the fuzzer gets behind it.

#![no_main]

use bloomcast::bundle::{Bundle, Manifest, archive, assemble};
use libfuzzer_sys::fuzz_target;

const TEMPLATE: &[u8] = include_bytes!("../template.bloom");
const MEMBERS: [&str; 4] = ["manifest.json", "head.safetensors", "tail.safetensors", "selftest.safetensors"];

fuzz_target!(|data: &[u8]| {
    let Some((kind, content)) = data.split_first() else { return };
    match MEMBERS.get(usize::from(*kind)) {
        None => read(content),
        Some(member) => read(&with(member, content)),
    }
});

/// What can be read can be written, and read again as the same.
fn read(bytes: &[u8]) {
    if let Ok(bundle) = Bundle::from_bytes("fuzzed", bytes) {
        let again = Bundle::from_bytes("again", &bundle.to_bytes()).expect("what was written can be read");
        let named = |bundle: &Bundle| (bundle.manifest().name.clone(), bundle.manifest().version);
        assert!(again.parts() == bundle.parts() && named(&again) == named(&bundle));
    }
}

/// The template with another member.
fn with(member: &str, content: &[u8]) -> Vec<u8> {
    let template = archive::unpack(TEMPLATE).expect("the template is a bundle");
    let members: Vec<(&str, &[u8])> = template.iter().filter(|(name, _)| *name != member).collect();
    if member == MEMBERS[0] {
        return archive::pack([(member, content)].into_iter().chain(members));
    }
    let (manifest, members) = members.split_first().expect("the template has a manifest");
    let manifest = Manifest::from_json(manifest.1).expect("the template's manifest is good");
    assemble(&manifest, &[members, &[(member, content)]].concat())
}
