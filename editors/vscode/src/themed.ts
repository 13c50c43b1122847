// Gives a page of the server the colours of the editor's theme.

const STYLE = `<style>
:root { --back: var(--vscode-editor-background); --text: var(--vscode-editor-foreground);
  --soft: var(--vscode-descriptionForeground); --line: var(--vscode-contrastBorder, var(--vscode-panel-border));
  --one: var(--vscode-charts-blue); --two: var(--vscode-disabledForeground); }
</style>`;

/** Return the page with the theme's colours instead of its own. */
export function toThemed(page: string): string {
  return page.replace("</head>", () => `${STYLE}</head>`);
}
