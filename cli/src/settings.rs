//! NeMo's way to override a recipe on the command line.

use std::ffi::OsString;

/// Arguments with `--a.b=value` and `--a.b value` as `--set a.b=value`: no other option has a dot in its name.
pub fn spelled_out(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments = arguments.into_iter();
    let mut out = Vec::new();
    while let Some(argument) = arguments.next() {
        let setting = argument.to_str().and_then(|text| text.strip_prefix("--"));
        match setting.map(|setting| setting.split_once('=').unwrap_or((setting, ""))) {
            Some((key, _)) if key.contains('.') && !key.contains(char::is_whitespace) => {
                let mut setting = OsString::from(setting.unwrap_or_default());
                if !setting.to_string_lossy().contains('=') {
                    setting.push("=");
                    setting.push(arguments.next().unwrap_or_default());
                }
                out.extend(["--set".into(), setting]);
            }
            _ => out.push(argument),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_with_dots_are_settings() {
        let given = [
            "flowtape",
            "train",
            "r.yaml",
            "--optimizer.lr=1e-4",
            "--a.b",
            "-1",
            "--json",
            "--set",
            "c.d=2",
            "--x=a.b",
        ];
        let expected = [
            "flowtape",
            "train",
            "r.yaml",
            "--set",
            "optimizer.lr=1e-4",
            "--set",
            "a.b=-1",
            "--json",
            "--set",
            "c.d=2",
            "--x=a.b",
        ];
        assert_eq!(spelled_out(given.map(OsString::from)), expected.map(OsString::from));
    }
}
