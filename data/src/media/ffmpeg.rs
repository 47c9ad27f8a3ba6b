//! Films and sound of any kind, through an `ffmpeg` of this machine.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use super::Picture;
use super::film::{Any, See};
use super::picture::check_size;

/// Shows the frames that are wanted, and gives how many there are: those of the film, or so many a second.
pub(super) fn walk(path: &Path, fps: Option<f64>, see: &mut See<'_>) -> Any<usize> {
    let mut arguments: Vec<String> = ["-map", "0:v:0"].map(str::to_owned).into();
    arguments.extend(
        fps.map(|fps| ["-vf".to_owned(), format!("fps=fps={fps}:start_time=0:round=near")]).into_iter().flatten(),
    );
    arguments.extend("-fps_mode passthrough -f image2pipe -c:v ppm -pix_fmt rgb24 -".split(' ').map(str::to_owned));
    let (count, ended) = run(path, &arguments, |out| frames(out, see))?;
    match ended {
        Ok(()) if count > 0 => Ok(count),
        Ok(()) => Err("ffmpeg: no frames".into()),
        Err(said) => Err(said.into()),
    }
}

/// The first `seconds` of a film's sound in so many channels, which take turns; nothing where it has none.
pub(super) fn sound(path: &Path, sampling_rate: usize, channels: usize, seconds: f64) -> Any<Option<Vec<f32>>> {
    let arguments = format!("-map 0:a:0 -t {seconds} -ac {channels} -ar {sampling_rate} -f f32le -");
    let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    let (bytes, ended) = run(path, &arguments, |out| {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes)?;
        Ok(bytes)
    })?;
    match ended {
        Ok(()) => Ok(Some(bytes.as_chunks().0.iter().map(|sample| f32::from_le_bytes(*sample)).collect())),
        Err(said) if said.contains("matches no streams") => Ok(None),
        Err(said) => Err(said.into()),
    }
}

/// Runs ffmpeg on a file and hands over what it writes; beside what became of that, whether it ended well, or the last that it said.
fn run<T>(
    path: &Path,
    arguments: &[String],
    take: impl FnOnce(&mut BufReader<ChildStdout>) -> Any<T>,
) -> Any<(T, Result<(), String>)> {
    // A path is no option, and no protocol.
    let mut file = OsString::from("file:");
    file.push(path);
    let mut child = Command::new("ffmpeg")
        .args(["-nostdin", "-v", "error", "-i"])
        .arg(file)
        .args(arguments)
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
    let taken = take(&mut BufReader::new(out));
    if taken.is_err() {
        // What is not read would keep it waiting.
        let _ = child.kill();
    }
    let ended = child.wait()?;
    let said = said.join().unwrap_or_default();
    let ended = if ended.success() { Ok(()) } else { Err(format!("ffmpeg: {}", said.trim())) };
    Ok((taken?, ended))
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
