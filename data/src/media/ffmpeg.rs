//! Films of any kind, through an `ffmpeg` of this machine.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use super::Picture;
use super::film::{Any, See};
use super::picture::check_size;

/// Shows the frames that are wanted, and gives how many there are.
pub(super) fn walk(path: &Path, see: &mut See<'_>) -> Any<usize> {
    // A path is no option, and no protocol.
    let mut file = OsString::from("file:");
    file.push(path);
    let mut child = Command::new("ffmpeg")
        .args(["-nostdin", "-v", "error", "-i"])
        .arg(file)
        .args([
            "-map",
            "0:v:0",
            "-fps_mode",
            "passthrough",
            "-f",
            "image2pipe",
            "-c:v",
            "ppm",
            "-pix_fmt",
            "rgb24",
            "-",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("ffmpeg can't be started: {error}; install it, or leave out --ffmpeg"))?;
    let (out, err) = (child.stdout.take().ok_or("no output")?, child.stderr.take().ok_or("no output")?);
    // Read aside, so that neither of the two waits for the other.
    let said = std::thread::spawn(move || {
        let mut said = String::new();
        let _ = BufReader::new(err).read_to_string(&mut said);
        said
    });
    let shown = frames(&mut BufReader::new(out), see);
    if shown.is_err() {
        // What is not read would keep it waiting.
        let _ = child.kill();
    }
    let ended = child.wait()?;
    let said = said.join().unwrap_or_default();
    let count = shown?;
    if !ended.success() || count == 0 {
        return Err(format!("ffmpeg: {}", said.trim().lines().last().unwrap_or("no frames")).into());
    }
    Ok(count)
}

/// Reads pictures in the form PPM, one behind the other.
fn frames(from: &mut impl BufRead, see: &mut See<'_>) -> Any<usize> {
    let mut count = 0;
    while !from.fill_buf()?.is_empty() {
        let mut word = || -> Any<String> {
            let mut word = String::new();
            loop {
                let mut byte = [0];
                from.read_exact(&mut byte)?;
                match byte[0] {
                    space if space.is_ascii_whitespace() => return Ok(word),
                    other => word.push(other.into()),
                }
            }
        };
        let [kind, width, height, depth] = [word()?, word()?, word()?, word()?];
        if kind != "P6" || depth != "255" {
            return Err(format!("ffmpeg: expected a picture P6 of depth 255, got {kind} of {depth}").into());
        }
        let (width, height) = (width.parse()?, height.parse()?);
        check_size((width, height))?;
        let mut rgb = vec![0; width as usize * height as usize * 3];
        from.read_exact(&mut rgb)?;
        if see.wants(count) {
            see.show(count, Picture { width: width as usize, height: height as usize, rgb })?;
        }
        count += 1;
    }
    Ok(count)
}
