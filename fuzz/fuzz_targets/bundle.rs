//! Fuzzes the reading of a bundle: arbitrary bytes cause neither a panic nor an allocation of a size that a header states.
//!
//! The first byte selects the kind of the rest: a whole file, or one member of an otherwise valid bundle, whose hash is
//! corrected so that the fuzzer reaches the parser of the member.

#![no_main]

use bloomcast::bundle::{Bundle, Manifest, archive, assemble};
use libfuzzer_sys::fuzz_target;

const TEMPLATE: &[u8] = include_bytes!("../template.bloom");
const MEMBERS: [&str; 4] = ["manifest.json", "head.safetensors", "tail.safetensors", "selftest.safetensors"];

fuzz_target!(|data: &[u8]| {
    let Some((kind, content)) = data.split_first() else { return };
    match MEMBERS.get(usize::from(*kind)) {
        None => read(content),
        Some(member) => read(&with_member(member, content)),
    }
});

/// Checks that a bundle that can be read is equal after writing and reading it again.
fn read(bytes: &[u8]) {
    if let Ok(bundle) = Bundle::from_bytes("fuzzed", bytes) {
        let again = Bundle::from_bytes("again", &bundle.to_bytes()).expect("a written bundle can be read");
        let identity = |bundle: &Bundle| (bundle.manifest().name.clone(), bundle.manifest().version);
        assert!(again.contents() == bundle.contents() && identity(&again) == identity(&bundle));
    }
}

/// Returns the template with another content of one member.
fn with_member(member: &str, content: &[u8]) -> Vec<u8> {
    let template = archive::unpack(TEMPLATE).expect("the template is a bundle");
    let members: Vec<(&str, &[u8])> = template.iter().filter(|(name, _)| *name != member).collect();
    if member == MEMBERS[0] {
        return archive::pack([(member, content)].into_iter().chain(members));
    }
    let (manifest, members) = members.split_first().expect("the template has a manifest");
    let manifest = Manifest::from_json(manifest.1).expect("the template's manifest is valid");
    assemble(&manifest, &[members, &[(member, content)]].concat())
}
