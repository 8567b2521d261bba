//! The rules of ARCHITECTURE.md that can be read off the sources: which module may import which, which file may name which
//! dependency, where unsafe code may be, and that the map shows what is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the library. Each may import itself and the modules before it; those of one line, each other.
const ORDER: &[&[&str]] = &[
    &["system"],
    &["frame"],
    &["chart"],
    &["camera"],
    &["vision"],
    &["decide"],
    &["vision_stage"],
    &["bundle"],
    &["mqtt"],
    &["update"],
    &["config"],
    &["train", "zoo", "fetch", "bench"],
    &["daemon"],
    &["demo"],
];

/// Imports that the order would allow.
const FORBIDDEN: &[(&str, &str)] = &[("vision", "camera")];

/// Crates, or prefixes of crates, and the only paths below the repository that may name them.
const ONLY: &[(&str, &[&str])] = &[
    ("tract_", &["src/vision/backbone/"]),
    ("nokhwa", &["src/camera/v4l2"]),
    ("v4l", &["src/camera/v4l2"]),
    ("rumqttc", &["src/mqtt/"]),
    ("rumqttd", &["src/demo/broker.rs"]),
    ("ed25519_dalek", &["src/bundle/signature.rs"]),
    ("ureq", &["src/fetch/"]),
    ("clap", &["src/cli/", "src/main.rs"]),
    ("anyhow", &["src/cli/", "src/main.rs"]),
];

/// The crates that the kernels may depend on.
const KERNELS_DEPENDENCIES: &[&str] = &["nix", "rand_chacha", "thiserror"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Rust files below a folder, relative to the repository, with their text.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    collect(&root().join(folder), &mut files);
    let relative = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    files.iter().map(|path| (relative(path), fs::read_to_string(path).unwrap())).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Words and single punctuation characters of Rust code, without comments, and with string literals empty.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            3 + raw.find("\"#").map_or(raw.len(), |end| end + 2)
        } else if first == '"' {
            string_length(rest)
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            end
        } else {
            // A quote in a character literal does not begin a string.
            if rest.starts_with("'\"'") {
                3
            } else {
                tokens.push(first.to_string());
                first.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    tokens.retain(|token| !token.trim().is_empty());
    tokens
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return at + 1,
            _ => escaped = false,
        }
    }
    text.len()
}

/// The library's modules that a file names, as `crate::name`, `bloomcast::name` or by enough `super::`.
fn imports(file: &str, tokens: &[String]) -> BTreeSet<String> {
    let depth = depth(file);
    let mut found = BTreeSet::new();
    for (i, token) in tokens.iter().enumerate() {
        let starts_path = i < 2 || tokens[i - 1] != ":";
        let supers = match token.as_str() {
            "crate" | "bloomcast" => depth,
            "super" if starts_path => tokens[i..].chunks(3).take_while(|chunk| is_super(chunk)).count(),
            _ => continue,
        };
        if supers < depth {
            continue;
        }
        let path = if token == "super" { &tokens[i + 3 * supers..] } else { &tokens[(i + 3).min(tokens.len())..] };
        if token != "super" && tokens.get(i + 1).is_none_or(|next| next != ":") {
            continue;
        }
        found.extend(first_names(path));
    }
    found
}

fn is_super(chunk: &[String]) -> bool {
    chunk.len() == 3 && chunk[0] == "super" && chunk[1] == ":" && chunk[2] == ":"
}

/// The first name of a path, or the first of each path in a group `{a::b, c}`.
fn first_names(path: &[String]) -> Vec<String> {
    if path.first().is_none_or(|first| first != "{") {
        return path.first().into_iter().cloned().collect();
    }
    let (mut names, mut nesting) = (Vec::new(), 0);
    for pair in path.windows(2) {
        match pair[0].as_str() {
            "{" => nesting += 1,
            "}" => nesting -= 1,
            _ => {}
        }
        if nesting == 0 {
            break;
        }
        if nesting == 1 && (pair[0] == "{" || pair[0] == ",") {
            names.push(pair[1].clone());
        }
    }
    names
}

/// Returns the number of modules between the file's module and the crate's root.
fn depth(file: &str) -> usize {
    let path = file.strip_prefix("src/").unwrap().trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').count()
}

fn rank(module: &str) -> Option<usize> {
    ORDER.iter().position(|line| line.contains(&module))
}

#[test]
fn modules_import_only_modules_before_them() {
    let mut seen = BTreeSet::new();
    for (file, text) in sources("src") {
        let module = file["src/".len()..].split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        if ["lib", "main", "cli"].contains(&module.as_str()) {
            continue;
        }
        let own = rank(&module).unwrap_or_else(|| panic!("{file}: the module {module} has no place in the order"));
        for import in imports(&file, &tokens(&text)) {
            let Some(other) = rank(&import) else { continue };
            assert!(other <= own, "{file} imports {import}, which comes after {module}");
            let forbidden = FORBIDDEN.contains(&(module.as_str(), import.as_str()));
            assert!(!forbidden, "{file} imports {import}, which {module} must not");
        }
        seen.insert(module);
    }
    let expected: BTreeSet<String> = ORDER.iter().copied().flatten().map(|module| (*module).to_owned()).collect();
    assert_eq!(seen, expected, "modules of the order, and modules that are there");
}

#[test]
fn dependencies_are_named_only_where_they_belong() {
    let mut named = BTreeSet::new();
    for (file, text) in sources("src") {
        let tokens = tokens(&text);
        for (dependency, places) in ONLY {
            let is_it = |token: &String| match dependency.strip_suffix('_') {
                Some(prefix) => token.starts_with(dependency) || token == prefix,
                None => token == dependency,
            };
            // A crate's name is the first word of a path.
            let path = |i: usize| tokens.get(i + 1).is_some_and(|next| next == ":") && (i == 0 || tokens[i - 1] != ":");
            let used = |i: usize| i > 0 && tokens[i - 1] == "use";
            if (0..tokens.len())
                .any(|i| is_it(&tokens[i]) && (path(i) && tokens.get(i + 2).is_some_and(|t| t == ":") || used(i)))
            {
                named.insert(*dependency);
                let allowed = places.iter().any(|place| file.starts_with(place));
                assert!(allowed, "{file} names {dependency}, which only {} may", places.join(", "));
            }
        }
    }
    let expected: BTreeSet<&str> = ONLY.iter().map(|(dependency, _)| *dependency).collect();
    assert_eq!(named, expected, "dependencies of the rule, and dependencies that are used");
}

#[test]
fn unsafe_code_is_in_the_kernels_alone() {
    for folder in ["src", "tests", "benches", "examples"] {
        let files = sources(folder);
        assert!(!files.is_empty(), "{folder}");
        for (file, text) in files {
            assert!(!tokens(&text).iter().any(|token| token == "unsafe"), "{file} has unsafe code");
        }
    }
    for file in ["src/lib.rs", "src/main.rs"] {
        let text = fs::read_to_string(root().join(file)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{file} forbids unsafe code");
    }
    let kernels = sources("crates/kernels/src");
    assert!(
        kernels.iter().any(|(_, text)| tokens(text).iter().any(|token| token == "unsafe")),
        "the rule has an object"
    );
}

#[test]
fn the_kernels_know_no_tract_no_environment_and_no_global() {
    let manifest: toml::Table = fs::read_to_string(root().join("crates/kernels/Cargo.toml")).unwrap().parse().unwrap();
    for section in ["dependencies", "dev-dependencies"] {
        for name in manifest[section].as_table().unwrap().keys() {
            assert!(KERNELS_DEPENDENCIES.contains(&name.as_str()), "crates/kernels depends on {name}");
        }
    }
    let mut files = sources("crates/kernels/src");
    // The tests print a seed and may take it from the environment.
    files.retain(|(file, _)| !file.ends_with("/test_util.rs"));
    assert!(files.len() > 5);
    for (file, text) in files {
        let tokens = tokens(&text);
        for (i, token) in tokens.iter().enumerate() {
            assert!(!token.starts_with("tract"), "{file} names {token}");
            assert_ne!(token, "thread_local", "{file} has a global");
            let is_static = token == "static" && tokens[i - 1] != "'";
            assert!(!is_static, "{file} has a static");
            assert!(!(token == "env" && tokens[i + 1] == ":"), "{file} reads the environment");
        }
    }
}

#[test]
fn errors_are_typed() {
    for (file, text) in sources("src").into_iter().chain(sources("crates/kernels/src")) {
        // Helpers of tests may shorten what they check to a text.
        let tokens = tokens(text.split("#[cfg(test)]\nmod tests").next().unwrap());
        for (i, window) in tokens.windows(3).enumerate() {
            let is_string = window[0] == "," && window[1] == "String" && window[2] == ">";
            assert!(!(is_string && closes_a_result(&tokens, i)), "{file} has a Result<_, String>");
        }
    }
}

/// Whether the type argument before the token at `end` is one of a `Result<…>`.
fn closes_a_result(tokens: &[String], end: usize) -> bool {
    let mut nesting = 0;
    for i in (0..end).rev() {
        match tokens[i].as_str() {
            ">" if i > 0 && tokens[i - 1] != "-" && tokens[i - 1] != "=" => nesting += 1,
            "<" if nesting > 0 => nesting -= 1,
            "<" => return i > 0 && tokens[i - 1] == "Result",
            ";" | "{" => return false,
            _ => {}
        }
    }
    false
}

#[test]
fn the_map_shows_what_is_there() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() < 200, "ARCHITECTURE.md has {} lines", text.lines().count());
    let map = text.split("```text").find(|block| block.trim_start().starts_with("crates/")).expect("a map");
    let map = map.split("```").next().unwrap();
    let (mut folders, mut listed) = (Vec::<(usize, String)>::new(), BTreeSet::new());
    for line in map.lines().filter(|line| !line.trim().is_empty()) {
        let indent = line.len() - line.trim_start().len();
        // A line that continues the description of the one before begins far to the right.
        if indent >= 18 {
            continue;
        }
        let names = line.trim().split("  ").next().unwrap();
        folders.retain(|(depth, _)| *depth < indent);
        let above: String = folders.iter().map(|(_, name)| name.as_str()).collect();
        for name in names.split(", ") {
            let path = format!("{above}{name}");
            assert!(root().join(&path).exists(), "ARCHITECTURE.md lists {path}, which is not there");
            listed.insert(path.clone());
            if name.ends_with('/') {
                folders.push((indent, name.to_owned()));
            }
        }
    }
    for (file, _) in sources("src").into_iter().chain(sources("crates")) {
        let is_listed =
            listed.contains(&file) || listed.iter().any(|path| path.ends_with('/') && file.starts_with(path));
        assert!(is_listed, "ARCHITECTURE.md does not list {file}");
    }
}
